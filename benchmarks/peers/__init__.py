"""The tools that are measured beside this one, each as a process that takes turns."""
