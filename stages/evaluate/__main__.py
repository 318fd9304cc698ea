"""`python -m stages.evaluate --profile <profile>`."""

from m1.stage import main
from stages.evaluate.run import run

if __name__ == "__main__":
    main(run)
