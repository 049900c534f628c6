"""Training of the demo models. Run through `python run.py train`."""
