from m1 import stage
from stages.sft.train import run

if __name__ == "__main__":
    stage.main(run)
