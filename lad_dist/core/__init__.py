"""What passes between data, models and losses: batches, model outputs, the state of a step."""
