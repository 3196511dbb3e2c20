"""`python -m detr_dist` is `detr-dist`."""

from detr_dist.cli import main

if __name__ == "__main__":
    main()
