"""A vision tower, compiled: as one packed program of many images, and where Hugging Face's own calls reach its encoder."""
