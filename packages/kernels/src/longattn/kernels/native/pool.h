// A few threads of our own that sleep between calls. (A second OpenMP runtime beside torch's hangs in a forked child.)
//
// 1. The first call that wants more than one thread starts them; they are detached and live as long as the process.
// 2. A call takes the pool, wakes as many as it wants, works itself, and waits for the last of them.
// 3. A call that finds the pool taken by another Python thread, or that runs in a forked child, works alone.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>

#include "call.h"
#include "flush.h"
#include "tiles.h"

class Pool {
    std::mutex taken, guard;
    std::condition_variable wake, done;
    const std::function<void(int64_t)>* work = nullptr;
    int64_t started = 0, wanted = 0, running = 0, round = 0;
    const pid_t owner = getpid();

    void live(int64_t index) {
        int64_t seen = 0;
        std::unique_lock<std::mutex> lock(guard);
        for (;;) {
            wake.wait(lock, [&] { return round != seen; });
            seen = round;
            if (index >= wanted) continue;
            const auto* mine = work;
            lock.unlock();
            (*mine)(index);
            lock.lock();
            if (--running == 0) done.notify_one();
        }
    }

    void start(int64_t threads) {
        while (started < threads - 1) {
            const int64_t index = started + 1;
            try {
                std::thread([this, index] { live(index); }).detach();
            } catch (const std::system_error&) {
                return;  // the system has no more: fewer will do
            }
            started++;
        }
    }

    void share(int64_t threads, const std::function<void(int64_t)>& each) {
        {
            std::lock_guard<std::mutex> lock(guard);
            start(threads);
            wanted = least(threads, started + 1);
            running = wanted - 1;
            work = &each;
            round++;
        }
        wake.notify_all();
        each(0);
        std::unique_lock<std::mutex> lock(guard);
        done.wait(lock, [&] { return running == 0; });
    }

public:
    // task(thread, i) for every i < tasks; no thread runs two at a time. In a task results below 2^-126 are zeros, and tiles are set up where there are any.
    template <class Task>
    void run(int64_t threads, int64_t tasks, const Task& task) {
        std::atomic<int64_t> next{0};
        const std::function<void(int64_t)> each = [&](int64_t thread) {
            const Flush small(true);
            const TileState tiles;
            for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(thread, i);
        };
        threads = least(threads, tasks);
        if (threads > 1 && getpid() == owner && taken.try_lock()) {
            share(threads, each);
            taken.unlock();
        } else
            each(0);
    }

    static Pool& of_process() {
        static Pool* pool = new Pool;  // never destroyed: its threads outlive main
        return *pool;
    }
};
