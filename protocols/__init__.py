"""What a method needs of a model. Every host offers these; needs torch alone."""
