"""Training models that write about videos, and their drafts."""
