// Takes calls of the expert block from a GPU that writes a word of memory, in place of a driver's
// thread that makes them. By design that saves the driver's own way to its thread; whether it does
// is to be measured on each machine.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace lk {

// The GPU writes the address of a HostCall to `request`, waits until `answer` has it too, and
// writes 0 to `answer`. It makes one call at a time. Each word has a cache line of its own, since
// one is written by the GPU while the other is by the host.
struct MailboxWords {
  alignas(64) std::atomic<uint64_t> request{0};
  alignas(64) std::atomic<uint64_t> answer{0};
};

// A thread that makes the calls that arrive in a pair of words. It spins while calls come at least
// once a second, and looks once a millisecond otherwise.
class Mailbox {
 public:
  // `words` must outlive the mailbox, and the GPU must be able to write them.
  explicit Mailbox(MailboxWords* words);
  // Waits for the end of the call that is under way, and makes no other one.
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

 private:
  void serve();

  MailboxWords* words_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace lk
