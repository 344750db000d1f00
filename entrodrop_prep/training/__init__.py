"""For training processes: masked rows on the fly, losses, and checks of what reaches a model."""
