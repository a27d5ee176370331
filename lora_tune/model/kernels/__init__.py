"""Fused autograd functions for training LoRA over a frozen base: what PEFT computes, with fewer saved tensors."""
