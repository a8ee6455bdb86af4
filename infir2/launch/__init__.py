"""What the commands share: from a recipe or a model's name to objects that train, generate or tell about themselves."""
