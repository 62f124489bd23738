"""Multi-token prediction: drafts, their verification, and how many."""
