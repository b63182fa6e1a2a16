"""What the validate stage is made of: summaries of the images, the suites about them, and what people look at."""
