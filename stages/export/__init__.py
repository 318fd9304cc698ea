"""Export: the trained model as a transformers folder, checked against the model it was made from."""
