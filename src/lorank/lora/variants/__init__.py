"""The forward passes that replace PEFT's during a run. Each is a subclass of PEFT's ``LoraVariant``."""
