"""What scripts share: options, help, preparing data, starting processes. The only part that parses or prints."""
