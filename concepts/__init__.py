"""Concept learning: DreamBooth and Textual Inversion on any model behind `protocols.learner.Learner`."""
