"""Quality of a whole model whose attention AdaAttn serves. See `python -m quality --help`."""
from quality.cli import main

main()
