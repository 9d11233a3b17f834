"""The forward and backward pass of a LoRA layer as autograd functions, and the matrix products that they use."""
