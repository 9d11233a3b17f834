"""The forward and backward of a LoRA as autograd functions, and the products they are made of."""
