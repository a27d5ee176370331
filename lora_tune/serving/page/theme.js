// Applies the chosen colours before anything is painted. Without a choice the page follows the system.
(() => {
  try {
    const chosen = localStorage.getItem('lora_tune.theme');
    if (chosen === 'light' || chosen === 'dark') document.documentElement.dataset.theme = chosen;
  } catch {
    // storage is switched off: the system's colours
  }
})();
