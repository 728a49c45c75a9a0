// What `#include <mma.h>` means to a kernel header.
#pragma once

#include "../wmma.h"
