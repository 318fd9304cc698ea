"""Forms in which a model is stored, and how one becomes another; every name of a stored tensor is known here alone.

- `layouts`: the two layouts that other programs read, and what each can say of a model.
- `folder`: what a folder in one of them holds.
- `mapping`: tensors of a layout made from the training model's one at a time, and back; `convert` has the arithmetic.
- `megatron`: whole parameters read from a training checkpoint, without building the model that wrote it.
- `weights`: a base model's weights put into a training model.
- `released`: the released layout computed from its definition alone, to check exports against.
"""
