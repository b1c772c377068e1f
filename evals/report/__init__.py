"""One page about an artifact: tables, pictures, the gate's verdict, and how it was measured."""
