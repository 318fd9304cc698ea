"""What a stage declares about itself, is given and leaves behind, and when its work need not be done again."""
