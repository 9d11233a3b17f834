"""Several processes that train one model: DDP, FSDP2, DeepSpeed."""
