"""Dataset distillation for sequential recommendation by Tucker decomposition, fast."""
