"""The ops that the fusions put in the place of several."""
