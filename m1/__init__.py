"""The library under the stages: settings, runs, model, training, rollouts, tasks, data, tracking; and the commands."""
