"""What a PEFT layer computes while a run lasts: PEFT's ``LoraVariant``, one per form."""
