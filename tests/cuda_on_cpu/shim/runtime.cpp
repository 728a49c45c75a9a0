// The whole runtime in one translation unit, which compiles in a third of the time that its parts take.
#include "archive.cpp"
#include "block.cpp"
#include "calls.cpp"
#include "fiber.cpp"
#include "main.cpp"
#include "memory_order.cpp"
#include "shared_memory.cpp"
#include "wmma.cpp"
