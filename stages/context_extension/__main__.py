from m1 import stage
from stages.context_extension.train import run

if __name__ == "__main__":
    stage.main(run)
