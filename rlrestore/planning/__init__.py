"""What a run will need: memory, time, traffic, money; before the machines are rented."""
