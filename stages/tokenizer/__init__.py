"""The tokenizer: byte-level BPE trained on the corpus, with the tokens and the template of a conversation."""
