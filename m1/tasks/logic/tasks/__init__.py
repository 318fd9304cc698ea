"""One file for each task; it ends with `TASK`, an instance of `m1.tasks.logic.base.Task` named like the file."""
