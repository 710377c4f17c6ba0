"""What released engines declare, read without importing them, beside what our profiles and commands say of them."""
