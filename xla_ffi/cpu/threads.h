// Threads of this library. They live as long as the process: XLA may finish a run after Python has
// begun to tear its modules down.

#ifndef JAXMOE_XLA_FFI_CPU_THREADS_H_
#define JAXMOE_XLA_FFI_CPU_THREADS_H_

#include <cstdint>
#include <functional>
#include <vector>

namespace jaxmoe {

// Start the threads that the functions below need, so that those do not fail. They throw
// std::system_error if the system gives no thread.
void StartPool();
void StartDeviceThread(int32_t device);

// Runs `task` on one of as many workers as there are cores. Tasks must not wait for one another.
void RunOnPool(std::function<void()> task);

// Runs all tasks on the pool and then `done` on the worker that finished last. No tasks: `done`
// runs at once, here.
void RunAllOnPool(std::vector<std::function<void()>> tasks, std::function<void()> done);

// Runs `task` on the thread that belongs to a device, in the order of the calls.
//
// Completing a promise of XLA's runs whatever of the program comes next on that device, and a
// native collective there blocks its thread until all devices have come. So every device needs a
// thread of its own to be completed on; sharing one is a deadlock.
void RunOnDeviceThread(int32_t device, std::function<void()> task);

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_THREADS_H_
