from infra.stage_command import main

if __name__ == "__main__":
    main("stages.synthesize")
