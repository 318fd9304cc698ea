"""The corpus as token ids: Megatron indexed data sets for training and for held-out loss."""
