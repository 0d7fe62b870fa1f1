"""Three int8 versions of an image classifier, trained in seconds: the default demo's model."""
