"""Concept learning: DreamBooth and Textual Inversion on any model behind `hosts.learning.Learner`."""
