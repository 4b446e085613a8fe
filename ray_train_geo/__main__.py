"""``python -m ray_train_geo``: the command line, also where its script is not on the PATH."""

from ray_train_geo.cli import main

if __name__ == "__main__":
    main()
