"""Evaluation: tasks, graders, runs, and what they say of configurations."""
