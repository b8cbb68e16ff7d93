"""`python -m zipar_train`: what Lightning can start once more for each further process."""

from zipar_train.cli import main

main()
