"""The hybrid model on Megatron-core."""

from m1.model import devices

devices.prepare()
