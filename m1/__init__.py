"""The library under the stages: profile, model, training, tracking and the command line."""
