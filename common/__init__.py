"""What the seven projects share and what is not the lesson: config, data, loss, metrics, tracking, Hub."""
