"""Pretraining text: named sources, cleaned, filtered, de-duplicated and mixed into one file of documents."""
