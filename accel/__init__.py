"""What makes it faster and is optional; each thing stands beside a plain twin that the tests compare it with."""
