"""Knowledge of model files: their headers, tensors and schemes."""
