"""The command `recipes`: the shipped recipes."""


def recipes() -> None:
    """List the shipped recipes, one per line."""
    from zipar_train.recipe.load import load_recipe, recipe_folder, shipped

    for name in shipped():
        print(f"{name:20} {load_recipe(name).description}")
    print(f"\nFiles: {recipe_folder()}. Copy one, change it, and give its path to --recipe.")
