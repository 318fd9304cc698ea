"""`python -m stages.rl --profile <profile> --stage rl-40k` (or rl-80k)."""

from m1.stage import main
from stages.rl.train import run

if __name__ == "__main__":
    main(run)
